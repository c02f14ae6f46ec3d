"""The step loop: which requests run, the queues that they wait in, the caches."""
