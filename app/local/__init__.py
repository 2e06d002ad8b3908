"""Kafka, Valkey, PostgreSQL and MLflow on this machine, without Docker: real servers on loopback.

`services` is the page to read first: `up`, `down`, `status` and `addresses`. Each of `kafka`, `valkey`,
`postgres` and `mlflow` knows one server: which program it is, how it is prepared, and how it says that it is ready.
`process` starts a server so that it outlives the command, finds it again, and stops it with its children;
`ports` finds it a port. All of a service is in `<data root>/<service>/`: its data, `server.log`, and for as
long as it runs `state.json`.
"""
