"""What a validation measures besides losses, and the simple methods that a run is compared with."""
