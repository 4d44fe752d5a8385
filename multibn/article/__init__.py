"""The article, run: each of its statements as code, numbers and a picture, on one page. ``multibn article`` makes it."""
