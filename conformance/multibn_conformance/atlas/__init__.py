"""The atlas: what the frameworks' own BatchNorms do, asked of each in its own environment."""
