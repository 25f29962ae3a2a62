"""Tasks that come with the toolkit: data, maps and rewards that share their parsing, one file each."""
