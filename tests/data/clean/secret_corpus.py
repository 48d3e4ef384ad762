"""Credentials as services and people make them, in the places where they are written, and what stands there without being one.

Values are drawn before their places are, and nothing is changed afterwards: what a detector finds hard stays in.
"""

import base64
import string

from faker import Faker

_LETTERS = string.ascii_letters
_ALPHANUMERIC = string.ascii_letters + string.digits
_SYMBOLS = "!@#$%^&*()-_=+[]{};:,.?/~|"
_WORDS = Faker("en_US")


def draw(rng, count, letters=_ALPHANUMERIC):
    """Returns `count` characters, each drawn by lot."""
    return "".join(rng.choice(letters) for _ in range(count))


# ---- keys of services, by their published forms
_SERVICES = [
    lambda rng: "AKIA" + draw(rng, 16, string.ascii_uppercase + string.digits),
    lambda rng: rng.choice(["ghp_", "gho_", "ghs_"]) + draw(rng, 36),
    lambda rng: f"github_pat_{draw(rng, 22)}_{draw(rng, 59)}",
    lambda rng: "glpat-" + draw(rng, 20, _ALPHANUMERIC + "_-"),
    lambda rng: f"xoxb-{draw(rng, 12, string.digits)}-{draw(rng, 12, string.digits)}-{draw(rng, 24)}",
    lambda rng: f"https://hooks.slack.com/services/T{draw(rng, 8).upper()}/B{draw(rng, 8).upper()}/{draw(rng, 24)}",
    lambda rng: rng.choice(["sk_live_", "rk_live_", "sk_test_"]) + draw(rng, 24),
    lambda rng: "sk-" + draw(rng, 48),
    lambda rng: "sk-proj-" + draw(rng, 120, _ALPHANUMERIC + "_-") + draw(rng, 2),
    lambda rng: "sk-ant-api03-" + draw(rng, 93, _ALPHANUMERIC + "_-") + "AA",
    lambda rng: "hf_" + draw(rng, 34, _LETTERS),
    lambda rng: "AIza" + draw(rng, 35, _ALPHANUMERIC + "_-"),
    lambda rng: "GOCSPX-" + draw(rng, 28, _ALPHANUMERIC + "_-"),
    lambda rng: f"SG.{draw(rng, 22)}.{draw(rng, 43)}",
    lambda rng: "npm_" + draw(rng, 36),
    lambda rng: "dckr_pat_" + draw(rng, 27),
    lambda rng: "hvs." + draw(rng, 95),
    lambda rng: "dop_v1_" + draw(rng, 64, "0123456789abcdef"),
    lambda rng: f"{draw(rng, 10, string.digits[1:])}:AA{draw(rng, 33)}",
    lambda rng: "gsk_" + draw(rng, 52),
    lambda rng: f"eyJ{_base64(rng, 24)}.eyJ{_base64(rng, 60)}.{_base64(rng, 33)}",
    lambda rng: (
        "-----BEGIN RSA PRIVATE KEY-----\n"
        + "\n".join(draw(rng, 64, _ALPHANUMERIC + "+/") for _ in range(8))
        + "\n-----END RSA PRIVATE KEY-----"
    ),
    lambda rng: "-----BEGIN OPENSSH PRIVATE KEY-----\n" + draw(rng, 70) + "\n-----END OPENSSH PRIVATE KEY-----",
]
_SERVICE_PLACES = ['key = "{}"', "token: {}", "export X={}", "use {} for now", "'{}'", "{}", "curl -H 'X-Auth: {}'", "<{}>"]


def _base64(rng, count):
    return base64.urlsafe_b64encode(rng.randbytes(count)).decode()


def service_key(rng):
    """Returns (key, text that holds it)."""
    value = rng.choice(_SERVICES)(rng)
    return value, rng.choice(_SERVICE_PLACES).format(value)


# ---- values that nothing but their place gives away
def drawn_value(rng):
    """Returns what a generator makes: 8 to 64 characters by lot."""
    return rng.choice(
        [
            lambda: draw(rng, rng.randrange(8, 65)),
            lambda: draw(rng, rng.randrange(8, 65), _LETTERS),
            lambda: draw(rng, rng.randrange(8, 33), string.ascii_lowercase),
            lambda: draw(rng, rng.choice([32, 40, 64]), "0123456789abcdef"),
            lambda: base64.b64encode(rng.randbytes(rng.choice([16, 20, 24, 32, 48]))).decode(),
            lambda: _base64(rng, rng.choice([16, 24, 32])).rstrip("="),
        ]
    )()


def typed_value(rng):
    """Returns a password as people choose it."""
    word, other = (_WORDS.word() for _ in range(2))
    name = _WORDS.first_name()
    return rng.choice(
        [
            lambda: f"{name}{rng.randrange(1950, 2026)}",
            lambda: f"{name}{rng.randrange(10, 1000)}{rng.choice('!?#*')}",
            lambda: f"{word.capitalize()}{other.capitalize()}{rng.randrange(1, 100)}",
            lambda: f"{word}{rng.choice('!@#$_-.')}{other}{rng.randrange(10, 9999)}",
            lambda: (word + other).translate(str.maketrans("aeiost", "43105+")) + rng.choice(["!", "1", ""]),
            lambda: "".join(_WORDS.word() for _ in range(3)),
            lambda: rng.choice(["qwerty", "Summer", "Winter", "Welcome", "Dragon"]) + f"{rng.randrange(100, 9999)}!",
        ]
    )()


def symbol_value(rng):
    """Returns a password of letters, digits and symbols by lot, 8 to 32 characters."""
    return draw(rng, rng.randrange(8, 33), _ALPHANUMERIC + _SYMBOLS)


_NAMES = [
    "password", "passwd", "db_password", "DB_PASSWORD", "userPassword", "MYSQL_ROOT_PASSWORD", "smtp-password", "pwd",
    "secret", "client_secret", "clientSecret", "SECRET_KEY", "passphrase", "DB_PASS", "smtp_pass", "dbPass", "Kennwort",
    "passcode", "dbpass", "MYSQL_PASS",
]  # fmt: skip
_TOKEN_NAMES = [
    "api_key", "apiKey", "API-KEY", "auth_token", "ACCESS_TOKEN", "accessToken", "access_key", "private_key", "token",
    "refresh_token", "aws_secret_access_key", "encryption_key",
]  # fmt: skip
_QUOTED = ['{} = "{}"', "{}='{}'", '"{}": "{}"', "'{}': '{}',", '{}: "{}"', '{} := "{}"', "{} => '{}',", 'config["{}"] = "{}"',
           'export {}="{}"', '<property {}="{}"/>', '{{"user": "bob", "{}": "{}"}}', 'connect(host, {}="{}")']  # fmt: skip
_BARE = ["{}={}\n", "export {}={}\n", "{}: {}\n", "  {}: {}\n", "{} = {}\n", "HOST=a.b\n{}={}\nPORT=1\n"]
_URLS = ["postgres://app:{}@db.corp.net:5432/main", "mongodb+srv://admin:{}@cluster0.corp.net/x", "redis://default:{}@cache:6379",
         "https://bob:{}@git.corp.net/a/b.git", "amqp://svc:{}@mq.corp.net"]  # fmt: skip
_HEADERS = ['curl -H "Authorization: Bearer {}" https://api.corp.net', "Authorization: Bearer {}", "Authorization: token {}",
            "X-Api-Key: {}", 'headers={{"Authorization": "Bearer {}"}}']  # fmt: skip
_COMMANDS = ["--password {} --host a", "tool --password={} run", "curl -u bob:{} https://a.b/c", "mysql -u root -p{} main",
             "sshpass -p {} ssh bob@a", "login --token {}", "curl --user bob:{} https://a.b/c"]  # fmt: skip
_IN_PROSE = [
    "the password is {}",
    "My password: {}",
    "(password {})",
    "password is '{}'",
    "Kennwort: {}",
    "mot de passe : {}",
    "The password of the old account is {}",
    "The password is\n{}",
    "The password is:\n\n  {}",
    "user=bob pass={}",
]
_XML = ["<{0}>{1}</{0}>"]


def placed_value(rng):
    """Returns (value, text that holds it) of one that its place gives away."""
    kind = rng.randrange(10)
    if kind < 4:  # a literal of a program or of JSON
        name = rng.choice(_NAMES + _TOKEN_NAMES)
        makers = [drawn_value, typed_value, symbol_value] if name in _NAMES else [drawn_value]
        value = rng.choice(makers)(rng)
        return value, rng.choice(_QUOTED).format(name, value)
    if kind < 7:  # an .env file, YAML, ini
        name = rng.choice(_NAMES + _TOKEN_NAMES)
        makers = [drawn_value, typed_value, symbol_value] if name in _NAMES else [drawn_value]
        # What begins a comment, a list or a quotation there has to be quoted.
        value = rng.choice(makers)(rng)
        while (
            value[0] in "#[]{}&*!|>%@,?:-=(~$`'\"" or "#" in value or ": " in value or value.endswith((",", ";", ":", ")", "."))
        ):
            value = rng.choice(makers)(rng)
        return value, rng.choice(_BARE).format(name, value)
    if kind == 7:
        value = rng.choice([drawn_value, typed_value])(rng)
        return value, rng.choice(_URLS).format(value.replace("/", "_").replace("#", "%23"))
    if kind == 8:
        value = rng.choice([lambda: draw(rng, rng.randrange(20, 65)), lambda: _base64(rng, 32).rstrip("=")])()
        return value, rng.choice(_HEADERS).format(value)
    value = rng.choice([lambda: draw(rng, rng.randrange(8, 33)), lambda: typed_value(rng)])()
    place = rng.choice(_COMMANDS + _IN_PROSE + _XML)
    return value, place.format("password", value) if place in _XML else place.format(value)


def secret(rng):
    """Returns (value, text that holds it)."""
    while True:
        value, text = (service_key if rng.random() < 0.35 else placed_value)(rng)
        if value in text:
            return value, text


# ---- what stands in such places without being one
_STAND_INS = [
    "changeme", "changeit", "CHANGE_ME", "change-this-password", "your_password_here", "YOUR_API_KEY", "your-secret",
    "<password>", "<your token here>", "${PASSWORD}", "$PASSWORD", "$(cat file)", "{{ password }}", "{{vault_password}}",
    "%(password)s", "%s", "{password}", "********", "xxxxxxxx", "XXXXXXXXXXXX", "None", "null", "undefined", "true", "false",
    "", "...", "[REDACTED]", "REPLACE_ME", "replace-with-your-key", "INSERT_TOKEN_HERE", "enter_password", "placeholder",
    "TODO", "example", "password", "my_password", "mypassword", "secret", "mysecret", "my-secret-key", "some_password",
    "dummy", "test", "testpassword", "foobar", "hunter", "<secret>", "[hidden]", "not-a-real-key", "example_key_123",
    "api_key_here", "#{password}", "@password@", "sample-token", "fake_token_12345", "string", "required",
    "put-your-token-here", "YOURPASSWORD", "password123", "abc123", "********1234",
]  # fmt: skip
_CODE = [
    "password = getpass.getpass()", "password = input('Password: ')", "password=password", "self.password = password",
    "password = request.form['password']", "token = tokenizer.encode(text)", "key = os.environ['API_KEY']",
    "if password is None:", "password = os.getenv('DB_PASSWORD')", "token = tokens[0]", "secret = config.secret_2",
    "api_key = settings.API_KEY", "password: str = field(default=None)", "password: String,", "token: Option<String>,",
    "const token = await getToken(user)", "const password = req.body.password;", "let secret = generate_secret(32);",
    "self.token_type = token_types[0]", "access_key = config.access_key_2", "primary_key=True, key=lambda x2: x2",
    "private_key = load_pem(path)", "char *password = argv[2];", "password_hash = hash_password(password1)",
    'token := r.Header.Get("X-Token")', "def check(password, secret=None, token=''):", "password VARCHAR(255) NOT NULL",
    "secret_key_base: <%= ENV['KEY'] %>", "passwordField.setText(value)", "token_count = 128000", "max_tokens: 4096",
    "password_length: 16", '<input type="password" name="password1">', "token == Token.IDENTIFIER2",
    "auth_token=auth.token(user_id2)", "secretName: tls-certificate-2024", "token_url: https://a.b/oauth2/token",
    "PASS: tests/test-2.sh", "PASS: test_parse2", "pass: 12 of 15 tests", "first pass: optimise2_loops", "bypass=mode2_fast",
    '{"pass": "12ms"}', "passes = run_passes2()", "compass: north2_west", "second pass: see figure2b", "pass_rate=0.95123",
    "boarding pass: B4423-2024", "pass  # noqa: S110", "pass = pass + 1",
    'render_pass = "shadow_map_2"', 'depth_pass: "gbuffer0"', "pass = 'Geometry2D'", 'highPass = "biquad_filter_1"',
    'lowPass: "f0=440Hz,Q=0.7"', "high_pass=iir_filter_20hz", 'pass2 = "lowering2ir"', 'pass="simplifycfg1"',
    "PASS=second-pass2", "FIRST_PASS=ffmpeg-pass1.log", 'two_pass: "Encode2Pass!"', '"pass": "gvn-hoist-2"',
    "password:\n  description: Foo2Bar", "key: ctrl+shift+p",
    "sort_key = item.name2", "public_key = ssh-rsa", "password_file: /run/secrets/db2",
    "PASSWORD_FILE=/run/secrets/x1", "token.type = TokenType.NUMBER", '"token_type": "bearer"', "key_size: 2048",
    '"password": {"type": "string"}', "passwd = pwd.getpwnam(name).pw_passwd", "pwd = os.getcwd()", "pwd=$(pwd)",
    "PWD=/home/user1/project2", "password.encode('utf8')", 'private_key_path = "~/.ssh/id_ed25519"', "secrets.token_hex(16)",
    "password=self.password2", "token=csrf_token(request)",
]  # fmt: skip
_PROSE = [
    "the password is required", "Your password must have 8 characters", "password: at least 8 characters",
    "Password: required", "the token is sent with every request", "the secret is to keep stirring", "a secret: nobody knows",
    "Passwords are case-sensitive.", "API key: see the settings page", "The password is case-sensitive",
    "Forgot password? Click here.", "a password is optional", "the secret service, founded in 1865",
    "secret: an agreement of 1919", "The Secretary: Mr Kowalczyk", "token: the smallest unit", "--password PASSWORD",
    "--password=PASSWORD", "--token FILE", "--password-file FILE", "-p, --password password", "Bearer authentication is used",
    "Authorization: Basic <credentials>", "Authorization: Bearer <token>", "Authorization: Bearer $TOKEN",
    "curl -u username:password URL", "curl -u $USER:$PASS https://a.b", "mysql -u root -p", "mkdir -p directory",
    "https://user:password@host/path", "ftp://user:pass@host", "https://<user>:<password>@host",
    "postgres://$USER:$PASSWORD@localhost/db", "password (optional)", "the passphrase is asked for twice",
    '"password": "Contraseña"', '"password": "Passwort"', "password = Passwort", "token authentication, see RFC 6750",
    "the keyword: value pairs", '"forgotPassword": "Zapomenuté heslo"', "The key is on the table.",
    "The secret to good pasta is salt4water", "Key findings: results of 2024", "ssh -p 2222 host1", "password policy v2.1.3",
]  # fmt: skip
_HASHES = [
    lambda rng: f"commit {draw(rng, 40, '0123456789abcdef')}", lambda rng: f"sha256:{draw(rng, 64, '0123456789abcdef')}",
    lambda rng: f"\"integrity\": \"sha512-{base64.b64encode(rng.randbytes(64)).decode()}\"",
    lambda rng: f"md5 = {draw(rng, 32, '0123456789abcdef')}", lambda rng: f"ETag: \"{draw(rng, 32, '0123456789abcdef')}\"",
    lambda rng: f"id: {draw(rng, 24, '0123456789abcdef')}", lambda rng: f"https://youtu.be/{draw(rng, 11)}",
    lambda rng: f"src=\"data:image/png;base64,{base64.b64encode(rng.randbytes(60)).decode()}\"",
    lambda rng: f"ssh-rsa AAAAB3NzaC1yc2E{draw(rng, 80)} bob", lambda rng: f"build-{draw(rng, 8).lower()}.tar.gz",
]  # fmt: skip


def _stand_in(rng):
    name, value = rng.choice(_NAMES + _TOKEN_NAMES), rng.choice(_STAND_INS)
    return rng.choice(_QUOTED + _BARE).format(name, value)


SECRET_LOOKALIKES = {
    "stand-in": _stand_in,
    "code with secrets' names": lambda rng: rng.choice(_CODE),
    "prose of secrets": lambda rng: rng.choice(_PROSE),
    "hash": lambda rng: rng.choice(_HASHES)(rng),
}
