"""What tests of several rooms share: pictures and files made in code."""
