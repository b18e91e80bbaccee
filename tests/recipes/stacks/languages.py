"""Compiled languages, those with a virtual machine, and the web's."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt, file, once

_MAIN = """\
package shop;

public class Main {
  public static void main(String[] words) {
    System.out.println("sum " + java.util.stream.IntStream.rangeClosed(1, 100).sum());
  }
}
"""
_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>shop</groupId>
  <artifactId>shop</artifactId>
  <version>1</version>
  <properties>
    <maven.compiler.release>17</maven.compiler.release>
    <project.build.sourceEncoding>UTF-8</project.build.sourceEncoding>
  </properties>
</project>
"""
_SHOP_JAVA = "/root/shop/src/main/java/shop/Main.java"

LANGUAGES = (
    Stack(
        "jvm",
        "debian-12",
        (
            apt("openjdk-17-jdk-headless"),
            file(_SHOP_JAVA, _MAIN),
            "cd /root/shop && javac -d out src/main/java/shop/Main.java && "
            "jar --create --file /opt/shop.jar --main-class shop.Main -C out .",
        ),
        (
            ("java -jar /opt/shop.jar", "sum 5050"),
            ("echo 'System.out.println(6 * 7)' | jshell -s -", "42"),
        ),
    ),
    Stack(
        "maven",
        "debian-12",
        (
            apt(
                "openjdk-17-jdk-headless maven maven-repo-helper libmaven-jar-plugin-java "
                "libmaven-compiler-plugin-java libmaven-resources-plugin-java libsurefire-java"
            ),
            file(_SHOP_JAVA, _MAIN),
            file("/root/shop/pom.xml", _POM),
            # Debian's own repository of Maven's plugins takes the place of the central one.
            "cp -rL /usr/share/maven-repo /root/repository && cd /root/shop && "
            "mvn -o -B -q -Dmaven.repo.local=/root/repository package",
        ),
        (
            ("java -cp /root/shop/target/shop-1.jar shop.Main", "sum 5050"),
            (
                "cd /root/shop && sed -i 's/100/10/' src/main/java/shop/Main.java && "
                "mvn -o -B -q -Dmaven.repo.local=/root/repository package; "
                "java -cp target/shop-1.jar shop.Main",
                "sum 55",
            ),
        ),
    ),
    Stack(
        "go",
        "debian-12",
        (
            apt("golang-go gcc libc6-dev"),
            file("/root/shop/go.mod", "module shop\n\ngo 1.19\n"),
            file(
                "/root/shop/main.go",
                """\
package main

import (
	"fmt"
	"net/http"
)

func Sum(n int) int { return n * (n + 1) / 2 }

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "sum", Sum(100))
	})
	http.ListenAndServe("localhost:8080", nil)
}
""",
            ),
            file(
                "/root/shop/main_test.go",
                'package main\n\nimport "testing"\n\nfunc TestSum(t *testing.T) {\n'
                '\tif Sum(10) != 55 {\n\t\tt.Fatal("wrong")\n\t}\n}\n',
            ),
            "cd /root/shop && go build -o /usr/local/bin/shop .",
        ),
        (
            ("(shop &) && " + once("curl -sf localhost:8080"), "sum 5050"),
            ("cd /root/shop && go test ./...", "ok"),
        ),
    ),
    Stack(
        "rust",
        "debian-12",
        (
            apt("cargo librust-itoa-dev"),
            # Debian's crates take the place of the registry.
            file(
                "/root/.cargo/config.toml",
                '[source.crates-io]\nreplace-with = "debian"\n'
                '[source.debian]\ndirectory = "/usr/share/cargo/registry"\n',
            ),
            "cd /root && cargo new --vcs none shop && echo 'itoa = \"1\"' >> shop/Cargo.toml && "
            "echo 'fn main() { let n: u32 = (1..=100).sum(); "
            'println!("sum {}", itoa::Buffer::new().format(n)); }\' > shop/src/main.rs && '
            "cd shop && cargo build",
        ),
        (
            ("/root/shop/target/debug/shop", "sum 5050"),
            (
                "cd /root/shop && sed -i 's/100/10/' src/main.rs && cargo run --offline",
                "sum 55",
            ),
        ),
    ),
    Stack(
        "c++",
        "debian-12",
        (
            apt("g++ cmake ninja-build catch2"),
            file(
                "/root/shop/CMakeLists.txt",
                "cmake_minimum_required(VERSION 3.20)\nproject(shop CXX)\nenable_testing()\n"
                "find_package(Catch2 2 REQUIRED)\nadd_executable(trial trial.cpp)\n"
                "target_link_libraries(trial Catch2::Catch2)\n"
                "add_test(NAME trial COMMAND trial)\n",
            ),
            file(
                "/root/shop/trial.cpp",
                "#define CATCH_CONFIG_MAIN\n#include <catch2/catch.hpp>\n"
                "#include <numeric>\n#include <vector>\n"
                'TEST_CASE("sum") { std::vector<int> v(101); std::iota(v.begin(), v.end(), 0);\n'
                "  REQUIRE(std::accumulate(v.begin(), v.end(), 0) == 5050); }\n",
            ),
            "cd /root/shop && cmake -G Ninja -B build && cmake --build build",
        ),
        (
            (
                "cd /root/shop && touch trial.cpp && cmake --build build && ctest --test-dir build",
                "100% tests passed",
            ),
        ),
    ),
    Stack(
        "ruby",
        "debian-12",
        (
            apt("ruby ruby-sinatra ruby-webrick bundler"),
            file("/root/shop/Gemfile", 'gem "sinatra"\ngem "webrick"\n'),
            file(
                "/root/shop/app.rb",
                'require "bundler/setup"\nrequire "sinatra"\nset :port, 8080\n'
                'get("/") { "sum #{(1..100).sum}" }\n',
            ),
            "cd /root/shop && bundle install --local",
        ),
        (
            (
                "cd /root/shop && (bundle exec ruby app.rb >/root/log 2>&1 &) && "
                + once("curl -sf localhost:8080")
                + "; cat /root/log",
                "sum 5050",
            ),
        ),
    ),
    Stack(
        "php",
        "debian-12",
        (
            apt("php-cli php-sqlite3 php-mbstring composer phpunit"),
            file(
                "/root/shop/composer.json",
                '{"name": "a/shop", "require": {"php": ">=8"},\n'
                ' "autoload": {"psr-4": {"Shop\\\\": "src/"}}}\n',
            ),
            file(
                "/root/shop/src/Sum.php",
                "<?php\nnamespace Shop;\nclass Sum { static function to(int $n): int "
                "{ return array_sum(range(1, $n)); } }\n",
            ),
            file(
                "/root/shop/index.php",
                "<?php require __DIR__ . '/vendor/autoload.php';\n"
                "$db = new PDO('sqlite:/opt/shop.db');\n"
                "echo 'sum ', Shop\\Sum::to($db->query('select n from size')->fetchColumn());\n",
            ),
            'cd /root/shop && composer install && php -r \'$db = new PDO("sqlite:/opt/shop.db"); '
            '$db->exec("create table size (n)"); $db->exec("insert into size values (100)");\'',
        ),
        (
            (
                "cd /root/shop && (php -S localhost:8080 >/dev/null 2>&1 &) && "
                + once("curl -sf localhost:8080"),
                "sum 5050",
            ),
            ("cd /root/shop && composer dump-autoload 2>&1", "Generated autoload files"),
        ),
    ),
    Stack(
        "node-web-app",
        "node-22",
        (
            "mkdir -p /opt/app/src && cd /opt/app && npm init -y && npm pkg set type=module && "
            "npm install react react-dom express && "
            "npm install -D vite @vitejs/plugin-react vitest",
            file(
                "/opt/app/index.html",
                "<div id=root></div><script type=module src=/src/m.jsx></script>\n",
            ),
            file(
                "/opt/app/src/m.jsx",
                'import { createRoot } from "react-dom/client";\nimport { sum } from "./sum.js";\n'
                'createRoot(document.getElementById("root")).render(<p>sum-{sum(100)}</p>);\n',
            ),
            file("/opt/app/src/sum.js", "export const sum = n => (n * (n + 1)) / 2;\n"),
            file(
                "/opt/app/src/sum.test.js",
                'import { expect, test } from "vitest";\nimport { sum } from "./sum.js";\n'
                'test("sum", () => expect(sum(100)).toBe(5050));\n',
            ),
            file(
                "/opt/app/server.js",
                'import express from "express";\n'
                'express().use(express.static("dist")).listen(8080, "localhost");\n',
            ),
            "cd /opt/app && npx vite build",
        ),
        (
            ("cd /opt/app && npx vitest run 2>&1", "1 passed"),
            (
                "cd /opt/app && npx vite build >/dev/null && (node server.js &) && "
                + once("curl -sf localhost:8080 -o /root/page")
                + '; curl -sf "localhost:8080$(grep -o "/assets/[^\\"]*js" /root/page)" | '
                "grep -o sum- | head -n 1",
                "sum-",
            ),
        ),
    ),
)
