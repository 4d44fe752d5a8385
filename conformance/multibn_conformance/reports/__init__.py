"""Reports of judgements: on a terminal, as a page, as JSON and as JUnit XML."""
