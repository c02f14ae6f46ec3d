"""Together's fine-tuning API over the jobs and files that OpenAI's routes make, for its client."""
