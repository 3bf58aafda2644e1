"""What both kinds of training share: losses and Adam with relative steps."""
