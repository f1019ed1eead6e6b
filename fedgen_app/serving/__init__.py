"""A run's clusters behind HTTPS: encoded prompts in, images, half-finished latents or mixed adapters out."""
