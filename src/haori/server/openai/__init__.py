"""OpenAI's routes: models, chat completions, completions, embeddings; and vLLM's beside them."""
