"""The edges of Headrace: settings, commands, the composition of a worker, the API, the services beside it."""
