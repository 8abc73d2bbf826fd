"""What several test files share: small models, checks, and generators of inputs."""
