"""Wrong BatchNorms, each a right one with a small change. ``multibn_conformance.defects`` lists them."""
