"""Webhooks: who is told when a job ends, and how, by the Standard Webhooks scheme."""
