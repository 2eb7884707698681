"""Tables as conversations."""
