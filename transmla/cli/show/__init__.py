"""What commands print on stdout: one file for each thing that is shown, results in, tables out."""
