"""The routes of AUTOMATIC1111's web UI under `/sdapi/v1`, for the clients that are written for them."""
