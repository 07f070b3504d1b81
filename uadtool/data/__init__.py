"""From paths and URLs to samples and pixels."""
