"""The fixed cases as files, and the judgement of answers to them."""
