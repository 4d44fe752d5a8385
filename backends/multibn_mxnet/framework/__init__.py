"""BatchNorm by MXNet's own operators: on accelerators, and for second derivatives."""
