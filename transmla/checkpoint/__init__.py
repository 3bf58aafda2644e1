"""The only place that opens weight files: resolve a name, read, write, copy what goes along, provenance."""
