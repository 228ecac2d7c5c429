"""Capture: sees every operator of a forward, knows which axis holds the examples, and taps gradients."""
