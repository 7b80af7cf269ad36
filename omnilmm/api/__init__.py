"""The OpenAI dialect: bytes of a request in, records out; records in, JSON and server-sent events out."""
