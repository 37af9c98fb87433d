"""One visible loop."""
