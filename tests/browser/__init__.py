"""The pages as people see them: opened in a browser, wide and narrow, light and dark, on paper."""
