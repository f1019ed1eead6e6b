"""Many runs from one file, and what they say together."""
