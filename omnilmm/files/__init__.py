"""What tenants upload and what jobs write for them: blobs on disk, their records in the durable database."""
