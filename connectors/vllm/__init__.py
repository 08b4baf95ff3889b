"""The vLLM connector: kv_connector `KvbmConnector`, kv_connector_module_path `connectors.vllm`."""

from connectors.vllm.connector import KvbmConnector
from connectors.vllm.spec import KvbmOffloadingSpec

__all__ = ["KvbmConnector", "KvbmOffloadingSpec"]
