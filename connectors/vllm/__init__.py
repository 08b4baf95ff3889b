"""The vLLM connector: kv_connector `KvbmConnector`, kv_connector_module_path `connectors.vllm`."""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from connectors.vllm.connector import KvbmConnector
from connectors.vllm.spec import KvbmOffloadingSpec

__all__ = ["KvbmConnector", "KvbmOffloadingSpec"]

# MultiConnector makes a child's statistics by the child's name alone.
KVConnectorFactory.register_connector("KvbmConnector", "connectors.vllm.connector", "KvbmConnector")
