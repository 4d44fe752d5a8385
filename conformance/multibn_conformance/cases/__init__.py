"""What is asked: the fixed cases, the random ones, and the inputs of both."""
