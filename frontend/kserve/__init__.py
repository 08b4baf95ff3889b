"""KServe's open inference protocol over gRPC."""
