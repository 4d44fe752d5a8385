"""Probes of a black box, each about one property; ``multibn_conformance.identify`` puts what they find together."""
