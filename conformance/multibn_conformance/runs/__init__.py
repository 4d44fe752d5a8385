"""What the commands run: backends, subjects outside, random seeds, whitening, and the suite itself."""
