"""Folders in the own form in inference engines that take classes of other packages: per engine a file that it loads at
its start, and one with what needs the engine itself."""
