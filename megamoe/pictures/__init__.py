"""What pages with pictures share: colours, escaping, the frame of a page, SVG and PNG without other packages."""
