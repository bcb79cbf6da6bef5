"""What several tests share: worlds to run the stages on, servers, browsers, hostile files."""
