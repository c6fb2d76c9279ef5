"""Pictures and pages for people; reads finished results, knows nothing of networks or training."""
