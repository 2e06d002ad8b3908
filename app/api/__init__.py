"""The query API: look-ups over HTTP, and the pages that probes and Prometheus read."""
