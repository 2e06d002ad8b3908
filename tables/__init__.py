"""Memory: profiles in RocksDB, and their mirror in Redis."""
