"""Web pages that need no network and no script: the HTML shell, the style sheet and the charts. Knows no run and no dataset."""
