"""The runs behind the commands: backends, external subjects, random seeds, whitening, and the self-test."""
