"""Estimate the time and memory of a training step before it runs on the device that it is meant for."""
