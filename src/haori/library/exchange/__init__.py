"""Adapters from elsewhere and to elsewhere: addresses, downloads, Civitai, the Hugging Face hub."""
