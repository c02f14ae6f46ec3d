"""The training API as the `tinker` client speaks it, in JSON and protobuf; `haori.jobs.sessions` does the work."""
