"""``multibn article``: each statement of the article as code, numbers and a picture, on one page."""
