"""What happens between machines."""
