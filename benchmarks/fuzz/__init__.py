"""What `serve_fuzz` sends: mutated HTTP and gRPC requests, clients that misbehave, and a witness that must not notice."""
