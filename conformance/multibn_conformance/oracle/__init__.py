"""What is right: exact values by a second derivation, and how far an answer may be off."""
