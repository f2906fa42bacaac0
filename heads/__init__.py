"""What stands on a backbone: classification, and later segmentation and detection."""
