"""The step loop: which requests run, their queue, their caches."""
