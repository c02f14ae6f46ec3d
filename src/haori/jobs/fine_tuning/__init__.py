"""Fine-tuning as a service: what is asked of it, the job that does it, and the names of what it made."""
