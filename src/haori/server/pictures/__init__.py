"""What the routes that draw share: the queue, limits, reading of requests with nothing ignored, pictures given."""
